"""`python -m launch.cli`: the command line without the installed script."""

from launch.cli.main import main

main()
