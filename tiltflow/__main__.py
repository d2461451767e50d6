"""`python -m tiltflow`, which launchers of several processes want: the command line."""

from tiltflow.cli import main

if __name__ == "__main__":
    main()
