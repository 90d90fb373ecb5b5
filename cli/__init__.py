"""The `video-ma2mba` command: one small file per verb."""
