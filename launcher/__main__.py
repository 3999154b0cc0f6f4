"""`python -m launcher` and `torchrun -m launcher`."""


def run() -> int:
    from launcher import torchrun

    if torchrun.is_follower():
        return torchrun.follow()
    from launcher.cli import main

    torchrun.follow_torchrun()
    try:
        return main()
    finally:
        torchrun.release_followers()


if __name__ == "__main__":
    from launcher.start import end_process

    end_process(run())
