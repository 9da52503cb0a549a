"""Measures of what an encoder has learned."""

KNN_K = 200
KNN_TEMPERATURE = 0.1
# Stands beside every kNN number.
KNN_PROTOCOL = (
    f"weighted kNN, bank train, queries validation, student encoder in eval mode, k={KNN_K}, T={KNN_TEMPERATURE}"
)
