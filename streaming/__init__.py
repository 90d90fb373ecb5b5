"""Videos that do not end: cameras, addresses, pipes and growing files, read as they come and asked at any moment."""
