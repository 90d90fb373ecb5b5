"""What a checkpoint needs to run. These files travel to the Hub, flattened into one folder."""
