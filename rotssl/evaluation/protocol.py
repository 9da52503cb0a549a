"""How accuracies are measured: the constants, and the texts that stand beside every number."""

KNN_K = 200

KNN_TEMPERATURE = 0.1

# Stands beside every kNN number.
KNN_PROTOCOL = (
    f"weighted kNN, bank train, queries validation, student encoder in eval mode, k={KNN_K}, T={KNN_TEMPERATURE}"
)

# Strengths of the L2 penalty, strong to weak, beside the mean cross-entropy: l2 / 2 x |weights|^2, the bias left out.
LINEAR_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

LINEAR_HELD_OUT = 5  # one in so many of each class chooses the strength

LINEAR_GRADIENT = 1e-5  # largest entry at which a fit has converged

LINEAR_ITERATIONS = 1000  # where it has not by then, it ends

# Stands beside every linear number.
LINEAR_PROTOCOL = (
    "multinomial logistic regression, bank train, queries validation, student encoder in eval mode, features standardised by the "
    f"bank, L2 {LINEAR_L2[0]:g} to {LINEAR_L2[-1]:g} by decades, chosen by cross-entropy on 1 in {LINEAR_HELD_OUT} of the bank, "
    f"L-BFGS until the gradient is at most {LINEAR_GRADIENT:g}, float32 shows no change, or for {LINEAR_ITERATIONS} iterations"
)
