"""What runs on a GPU machine in one go."""
