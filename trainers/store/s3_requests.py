"""S3 asked with as few requests as there can be.

Where something is not there, s3fs asks again: for a folder of that name, and for the folder above it.
"""

from typing import Any


def list_keys(filesystem: Any, folder: str, *, deep: bool) -> list[tuple[str, int | None]]:
    """Return (path, size) of what lies in a folder, `deep` of all below it; a folder in it has the size None.

    One request for a thousand keys. Paths are as `folder` is, with the bucket. Raises what s3fs raises.
    """
    bucket, _, prefix = f"{folder.rstrip('/')}/".partition("/")
    options: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix} | ({} if deep else {"Delimiter": "/"})
    found: list[tuple[str, int | None]] = []
    while True:
        answer = filesystem.call_s3("list_objects_v2", **options)
        found += [(f"{bucket}/{item['Key']}", int(item["Size"])) for item in answer.get("Contents", ())]
        found += [(f"{bucket}/{item['Prefix'].rstrip('/')}", None) for item in answer.get("CommonPrefixes", ())]
        if not answer.get("IsTruncated"):
            return found
        options["ContinuationToken"] = answer["NextContinuationToken"]


def look_at(filesystem: Any, path: str) -> dict[str, Any]:
    """Return what S3 says of an object: ContentLength, LastModified. Raises FileNotFoundError."""
    bucket, _, key = path.partition("/")
    found: dict[str, Any] = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
    return found
