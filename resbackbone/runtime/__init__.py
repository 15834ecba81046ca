"""What both trainers share; it is handed models, loaders and losses and knows none."""
