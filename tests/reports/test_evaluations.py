"""Evaluations in the terminal and on the page."""

import dataclasses
import math

from rotssl.reports import evaluations
from tests.reports.made_up import run

KNOWN = {
    **{"knn/top1": 0.5, "feature/effective_rank": 12.0, "finetune/1pct/top1": 0.6, "finetune/1pct/deviation": 0.02},
    **{"robustness/rotate_9/knn/top1": 0.4, "fewshot/5way_1shot/top1": 0.7, "fewshot/5way_1shot/interval": 0.01},
    **{f"robustness/jpeg_{severity}/knn/top1": severity / 10 for severity in (1, 2, 3)},
    "robustness/contrast_5_seed1/knn/top1": 0.6,
}


def test_rows_say_spreads_and_average_severities():
    assert list(evaluations.rows(KNOWN)) == [
        ("fewshot/5way_1shot", "70.0% \u00b1 1.0%"),
        ("finetune/1pct", "60.0% \u00b1 2.0%"),
        ("knn", "50.0%"),
        ("robustness/rotate_9/knn", "40.0%"),
        ("robustness/contrast, knn (mean of 1)", "60.0%"),
        ("robustness/all corruptions, knn (mean of 4)", "30.0%"),
        ("robustness/jpeg, knn (mean of 3)", "20.0%"),
    ]


def evaluated(parent, network, epochs, **values):
    params = {"card.protocol": "sgd", "card.network": network, "card.epochs": epochs, "card.bn": "frozen"}
    params |= {"card.k": "5, 200", "card.temperature": "0.1", "card.rates_tried": "0.3, 1.0", "card.rate": "0.3"}
    params |= {"card.labelled_images": "50", "card.split": "6bdc6d8573dc3508", "card.penalty": "0.01"}
    tags = {"kind": "evaluation", "mlflow.parentRunId": parent}
    return dataclasses.replace(run(), params=params, tags=tags, points={}, values=values)


def test_each_protocol_is_a_table_with_what_its_cards_share():
    parent = run()
    ours = [evaluated(parent.run_id, "student", "100", **{"sgd/paper/top1": 0.5, "sgd/x/top1": math.nan})]
    ours += [evaluated(parent.run_id, "teacher", "50", **{"teacher/sgd/paper/top1": 0.4})]
    others = [evaluated("another", "student", "100", **{"sgd/paper/top1": 0.9})]
    old = [dataclasses.replace(ours[0], params={"knn_protocol": "of before"})]
    (table,) = evaluations.tables_of([parent, *ours, *others, *old], [parent])
    assert table.title == "Evaluation: sgd" and "epochs: 100 or 50; rates tried: 0.3, 1.0; rate: 0.3;" in table.caption
    assert "BatchNorm: frozen; k: 5, 200; T: 0.1; penalty: 0.01;" in table.caption
    assert table.caption.endswith("labelled images: 50; checksums of the parts: 6bdc6d8573dc3508.")
    many = [evaluated(parent.run_id, "student", str(i), **{"sgd/paper/top1": 0.5}) for i in range(4)]
    assert "epochs: several, see the cards" in evaluations.tables_of([parent, *many], [parent])[0].caption
    assert [row[1:] for row in table.rows] == [
        ("student", "sgd/paper", "50.0%"),
        ("student", "sgd/x", "features are not finite"),
        ("teacher", "teacher/sgd/paper", "40.0%"),
    ]
    content = evaluations.content_of([parent, *ours, *others, *old], [parent])
    assert [entry["metrics"] for entry in content] == [{"sgd/paper/top1": 0.5}, {"teacher/sgd/paper/top1": 0.4}]
    assert content[0]["card"]["protocol"] == "sgd" and content[0]["run_id"] == parent.run_id
