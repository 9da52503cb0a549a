"""The evaluation protocols: their constants, and the texts that are recorded with every accuracy."""

from rotssl.config.evaluation import EvaluationConfig

KNN_K = 200

KNN_TEMPERATURE = 0.1

# Strengths of the L2 penalty, strong to weak, added to the mean cross-entropy: l2 / 2 x |weights|^2, without the bias.
LINEAR_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

LINEAR_HELD_OUT = 5  # one in this many of each class is held out to choose the strength

LINEAR_GRADIENT = 1e-5  # a fit has converged if no entry of the gradient is larger

LINEAR_ITERATIONS = 1000  # most iterations of a fit

_LINEAR = (
    f"features standardised by the bank, L2 {LINEAR_L2[0]:g} to {LINEAR_L2[-1]:g} by decades, chosen by cross-entropy on 1 in "
    f"{LINEAR_HELD_OUT} of the bank, L-BFGS until the gradient is at most {LINEAR_GRADIENT:g}, float32 shows no change, or for "
    f"{LINEAR_ITERATIONS} iterations"
)


def protocols(evaluation: EvaluationConfig, queries: str = "validation") -> dict[str, str]:
    """What is recorded with every accuracy, by the name of the tag.

    Args:
        evaluation: of the configuration.
        queries: the split that is classified.
    """
    bank = "train" if evaluation.bank is None else f"{evaluation.bank:,} images of train"
    common = f"bank {bank}, queries {queries}, {evaluation.network} encoder in eval mode"
    return {
        "knn_protocol": f"weighted kNN, {common}, k={evaluation.knn_k}, T={evaluation.knn_temperature:g}",
        "linear_protocol": f"multinomial logistic regression, {common}, {_LINEAR}",
    }
