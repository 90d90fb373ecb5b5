"""Cards made from what a checkpoint or data set really is, and the folder that goes to the Hub with them."""
