"""The page itself. Travels to a Space, so it knows the model only as a pipeline, and never imports this package."""
