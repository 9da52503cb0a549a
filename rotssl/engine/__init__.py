"""The training loop and what it is made of. Knows neither ray nor mlflow."""
