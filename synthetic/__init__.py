"""The rendered world: videos with questions and answers, made from a seed."""
