"""The training loop and its parts. Imports neither ray nor mlflow."""
