"""The evaluation protocols: their constants, and the texts that are recorded with every accuracy."""

KNN_K = 200

KNN_TEMPERATURE = 0.1

_KNN = f"weighted kNN, bank train, queries validation, student encoder in eval mode, k={KNN_K}, T={KNN_TEMPERATURE}"

# Strengths of the L2 penalty, strong to weak, added to the mean cross-entropy: l2 / 2 x |weights|^2, without the bias.
LINEAR_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

LINEAR_HELD_OUT = 5  # one in this many of each class is held out to choose the strength

LINEAR_GRADIENT = 1e-5  # a fit has converged if no entry of the gradient is larger

LINEAR_ITERATIONS = 1000  # most iterations of a fit

_LINEAR = (
    "multinomial logistic regression, bank train, queries validation, student encoder in eval mode, features standardised by the "
    f"bank, L2 {LINEAR_L2[0]:g} to {LINEAR_L2[-1]:g} by decades, chosen by cross-entropy on 1 in {LINEAR_HELD_OUT} of the bank, "
    f"L-BFGS until the gradient is at most {LINEAR_GRADIENT:g}, float32 shows no change, or for {LINEAR_ITERATIONS} iterations"
)


def protocols(queries: str = "validation", bank: int | None = None) -> dict[str, str]:
    """What is recorded with every accuracy, by the name of the tag.

    Args:
        queries: the split that is classified.
        bank: number of training images that it is compared with; None: all.
    """
    known = "train" if bank is None else f"{bank:,} images of train"
    texts = {"knn_protocol": _KNN, "linear_protocol": _LINEAR}
    return {
        name: text.replace("bank train", f"bank {known}").replace("queries validation", f"queries {queries}")
        for name, text in texts.items()
    }
