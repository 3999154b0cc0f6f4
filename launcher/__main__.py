"""`python -m launcher` and `torchrun -m launcher`."""

import sys


def run() -> int:
    from launcher.processes import torchrun
    from launcher.streams import open_streams

    stdout = open_streams()
    if torchrun.is_follower():
        return torchrun.follow()
    from launcher.cli import main

    torchrun.follow_torchrun()
    try:
        exit_code = main()
    finally:
        torchrun.release_followers()
    sys.stdout.flush()
    if stdout.error is None:
        return exit_code
    print(f"stdout took no more ({stdout.error.strerror}); report.json in the run's folder has all.", file=sys.stderr)
    return exit_code or 1


if __name__ == "__main__":
    from launcher.processes.start import end_process

    end_process(run())
