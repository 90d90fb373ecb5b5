"""The demo: a web page that reads a video and answers questions. `app.py` and this folder are a Space of the Hub."""
