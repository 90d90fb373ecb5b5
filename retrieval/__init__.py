"""Videos found by texts, and texts by videos: an index of vectors that is read once and searched many times."""
