"""`python -m video_ma2mba` is the `video-ma2mba` command."""

from video_ma2mba.cli.main import main

if __name__ == "__main__":
    main()
