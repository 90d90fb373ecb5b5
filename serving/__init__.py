"""An OpenAI-compatible server that reads a video once and keeps what the model remembers by an id."""
