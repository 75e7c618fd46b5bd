"""A cheap module to preload."""

import time

IMPORTED_AT = time.time()
