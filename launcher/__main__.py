"""`python -m launcher` and `torchrun -m launcher`."""

import sys


def run() -> int:
    from launcher import torchrun
    from launcher.start import end_rank

    if torchrun.is_follower():
        end_rank(torchrun.follow())
    from launcher.cli import main

    torchrun.follow_torchrun()
    try:
        exit_code = main()
    finally:
        torchrun.release_followers()
    if torchrun.is_rank():
        end_rank(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(run())
