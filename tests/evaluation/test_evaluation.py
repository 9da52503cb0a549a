import json
import logging
import math

import numpy as np
import pytest
import torch

from rotssl.evaluation import knn
from rotssl.evaluation.collapse import effective_rank, feature_std
from rotssl.evaluation.knn import knn_top1
from rotssl.evaluation.linear import fit, linear_top1, logits
from rotssl.evaluation.protocol import KNN_K, KNN_TEMPERATURE, LINEAR_HELD_OUT, LINEAR_L2
from rotssl.runs import checkpoint, journal
from rotssl.runs.journal import Journal
from tests.runs import full_disk, make_config, trainer


def features(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def naive_knn(bank, bank_labels, queries, query_labels):
    """One query after the other, in plain numbers."""
    correct = 0
    for query, label in zip(queries.tolist(), query_labels.tolist(), strict=True):
        cosines = []
        for row, known in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            dot = sum(x * y for x, y in zip(query, row, strict=True))
            cosines.append((dot / math.hypot(*query) / math.hypot(*row), known))
        votes = dict.fromkeys(range(10), 0.0)
        for cosine, known in sorted(cosines, reverse=True)[:KNN_K]:
            votes[known] += math.exp(cosine / KNN_TEMPERATURE)
        correct += max(votes, key=votes.get) == label
    return correct / len(queries)


@pytest.mark.parametrize(("size", "seed"), [(400, 0), (400, 1), (KNN_K // 4, 2)], ids=["more", "again", "fewer"])
def test_knn_is_the_naive_one_with_more_and_fewer_images_than_neighbours(size, seed, monkeypatch):
    gen = torch.Generator().manual_seed(seed)
    centres = 0.5 * features(5, seed=9)
    labels, asked = (torch.randint(0, 5, (count,), generator=gen) for count in (size, 90))
    # Lengths differ widely, for cosine must not see them; classes overlap, so that accuracy is far from 0 and 1.
    bank = (features(size, seed=seed) + centres[labels]) * torch.logspace(-2, 2, size)[:, None]
    queries = (features(90, seed=seed + 50) + centres[asked]) * torch.logspace(2, -2, 90)[:, None]
    expected = naive_knn(bank, labels, queries, asked)
    assert 0.3 < expected < 0.9
    topk, seen = torch.Tensor.topk, []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *args, **more: seen.append(x.nbytes) or topk(x, *args, **more))
    for most in (1, 7 * 4 * size + 3, 1 << 28):  # a row at least, seven at a time with a rest, all
        monkeypatch.setattr(knn, "CHUNK_BYTES", most)
        assert knn_top1(bank, labels, queries, asked) == pytest.approx(expected)
        assert max(seen) == max(4 * size, min(most - most % (4 * size), 90 * 4 * size))
        seen.clear()


def test_knn_weighs_the_near_above_the_many():
    # Three neighbours at cosine 0.5 have 3 exp(5) votes, one at cosine 1 has exp(10).
    bank = torch.tensor([[1.0, 0.0]] + [[0.5, math.sqrt(0.75)]] * 3)
    assert knn_top1(bank, torch.tensor([1, 0, 0, 0]), torch.tensor([[2.0, 0.0]]), torch.tensor([1])) == 1.0


def test_knn_in_bf16_is_close_and_is_in_bf16():
    gen = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(4, 16, generator=gen)
    labels, asked = torch.arange(400) % 4, torch.arange(200) % 4
    bank, queries = (centres[part] + 2 * torch.randn(len(part), 16, generator=gen) for part in (labels, asked))
    exact = knn_top1(bank, labels, queries, asked)
    assert exact < 0.98 and knn_top1(bank, labels, queries, asked, torch.bfloat16) == pytest.approx(exact, abs=0.02)
    # Cosines of 0.7001 and 0.7000 are one number in bf16, and of classes with equal votes the first is taken.
    near = torch.tensor([[c, math.sqrt(1 - c * c)] for c in (0.7000, 0.7001)])
    asked = near.new_tensor([[1.0, 0.0]]), torch.tensor([1])
    found = [knn_top1(near, torch.tensor([0, 1]), *asked, kind) for kind in (torch.float32, torch.bfloat16)]
    assert found == [1.0, 0.0]


def test_the_bf16_option_reaches_knn(tmp_path, monkeypatch):
    kinds = []
    monkeypatch.setattr("rotssl.evaluation.measure.knn_top1", lambda *given: kinds.append(given[-1]) or 0.5)
    for bf16 in (False, True):
        config = make_config(tmp_path / str(bf16), "simclr", **{"data.limit": 64, "evaluation.knn_bf16": bf16})
        trainer(config).evaluate(0)
    assert kinds == [torch.float32, torch.bfloat16]


def test_knn_asks_no_more_than_k_neighbours():
    # Beyond the k nearest, which are of class 0 and 1, there are far more of class 2.
    near, far = torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 0.5]])
    bank = torch.cat([near.expand(KNN_K, -1), far.expand(50 * KNN_K, -1)])
    labels = torch.cat([torch.zeros(KNN_K), torch.full((50 * KNN_K,), 2)]).long()
    assert knn_top1(bank, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 1.0


def test_knn_counts_a_class_that_the_bank_lacks_as_wrong():
    assert knn_top1(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7])) == 0.5


def blobs(count, classes=5, dim=24, spread=1.3, seed=0):
    """Features of overlapping classes, correlated and off the origin as an encoder's are, and their labels."""
    labels = torch.arange(count) % classes
    found = 0.6 * features(classes, dim, seed=99)[labels] + spread * features(count, dim, seed)
    return (found @ features(dim, dim, seed=98) / dim**0.5).relu() + 3, labels


def theirs(x, labels, l2):
    """Scikit-learn's classifier; its C is on the sum of the losses, our l2 on their mean."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=10000)
    return model.fit(x.double().numpy(), labels.numpy())


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize("seed", [None, 5], ids=["from zero", "from elsewhere"])
def test_a_linear_fit_is_scikit_learn_s(l2, seed):
    (x, labels), (asked, _) = blobs(600), blobs(2000, seed=1)
    mean, std = x.mean(0), x.std(0)
    x, asked = (x - mean) / std, (asked - mean) / std
    with torch.no_grad():
        ours = fit(x, labels, l2, torch.zeros(5, 25) if seed is None else features(5, 25, seed))
    model = theirs(x, labels, l2)
    reference = torch.tensor(np.hstack([model.coef_, model.intercept_[:, None]]))
    values = []
    for weights in (ours.double(), reference):
        loss = torch.nn.functional.cross_entropy(logits(x.double(), weights), labels)
        values.append(float(loss + l2 / 2 * weights[:, :-1].square().sum()))
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    same = logits(asked, ours).argmax(1).numpy() == model.predict(asked.double().numpy())
    assert same.mean() > 0.99


def test_linear_is_scikit_learn_s_at_the_strength_that_a_held_out_part_of_the_bank_likes_best():
    (bank, labels), (queries, asked) = blobs(300), blobs(3000, seed=1)
    x, q = ((part - bank.mean(0)) / bank.std(0, correction=0) for part in (bank, queries))
    held = torch.cat([(labels == label).nonzero()[::LINEAR_HELD_OUT, 0] for label in range(5)])  # 60 of a class: 12
    rest = torch.tensor(sorted(set(range(300)) - set(held.tolist())))
    losses = {}
    for l2 in LINEAR_L2:
        chances = theirs(x[rest], labels[rest], l2).predict_log_proba(x[held].double().numpy())
        losses[l2] = -chances[np.arange(len(held)), labels[held].numpy()].mean()
    scores = {l2: theirs(x, labels, l2).score(q.double().numpy(), asked.numpy()) for l2 in LINEAR_L2}
    best = min(losses, key=losses.get)
    assert best not in (LINEAR_L2[0], LINEAR_L2[-1])
    # The neighbours in the grid would be noticed.
    assert all(abs(score - scores[best]) > 0.005 for l2, score in scores.items() if l2 != best), scores
    assert linear_top1(bank, labels, queries, asked) == pytest.approx(scores[best], abs=0.002)


@pytest.mark.contract
def test_linear_asks_each_query_by_itself():
    (bank, labels), (queries, asked) = blobs(300), blobs(40, seed=1)
    alone = [linear_top1(bank, labels, queries[[i]], asked[[i]]) for i in range(40)]
    assert 0 < np.mean(alone) < 1
    assert linear_top1(bank, labels, queries, asked) == pytest.approx(np.mean(alone))


def test_linear_tells_apart_what_a_plane_can_and_guesses_where_there_is_nothing():
    (bank, labels), (queries, asked) = blobs(500, spread=0.1), blobs(500, spread=0.1, seed=1)
    assert linear_top1(bank, labels, queries, asked) == 1
    (bank, labels), (queries, asked) = blobs(1000), blobs(4000, seed=1)
    shuffled = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(3))]
    assert linear_top1(bank, labels, queries, asked) > 0.5
    assert linear_top1(bank, shuffled, queries, asked) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("scale", [1e-6, 1e6, torch.logspace(-6, 6, 24)], ids=["small", "large", "each its own"])
def test_linear_does_not_see_the_scale_of_features(scale):
    (bank, labels), (queries, asked) = blobs(300), blobs(1000, seed=1)
    expected = linear_top1(bank, labels, queries, asked)
    assert linear_top1(bank * scale, labels, queries * scale, asked) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_linear_leaves_out_what_is_constant_in_the_bank(value):
    (bank, labels), (queries, asked) = blobs(300), blobs(1000, seed=1)
    expected = linear_top1(bank, labels, queries, asked)
    # Half of them one bit up: features that should be equal may differ by as much.
    more = [
        torch.cat([part, value * (1 + 1.2e-7 * (torch.arange(len(part))[:, None] % 2))], 1) for part in (bank, queries)
    ]
    assert linear_top1(more[0], labels, more[1], asked) == pytest.approx(expected, abs=0.003)
    more[1][:, -1] += torch.linspace(-1, 1, 1000)  # it was constant in the bank only
    assert linear_top1(more[0], labels, more[1], asked) == pytest.approx(expected, abs=0.003)
    assert linear_top1(torch.full_like(bank, value), labels, queries, asked) == pytest.approx(0.2)  # all are: one class


def test_linear_counts_a_class_that_the_bank_lacks_as_wrong_and_refuses_to_number_what_is_none():
    (bank, labels), (queries, asked) = blobs(300, spread=0.1), blobs(100, spread=0.1, seed=1)
    assert linear_top1(bank, labels, queries, asked + 10 * (torch.arange(100) < 30)) == 0.7
    assert linear_top1(bank[labels < 4], labels[labels < 4], queries, asked) == pytest.approx(0.8)
    assert linear_top1(bank.half().requires_grad_(), labels, queries, asked) == 1  # reads, learns nothing back
    for value in (math.nan, math.inf):
        broken = bank.clone()
        broken[7, 7] = value
        assert math.isnan(linear_top1(broken, labels, queries, asked))
        assert math.isnan(linear_top1(bank, labels, broken, labels))


def test_effective_rank_of_known_matrices():
    orthonormal = torch.linalg.qr(features(64, 16))[0]
    assert effective_rank(orthonormal) == pytest.approx(16, rel=1e-3)
    assert effective_rank(100 * orthonormal) == pytest.approx(16, rel=1e-3)
    assert effective_rank(orthonormal[:, :1] @ features(1, 16)) == pytest.approx(1, abs=0.01)
    assert effective_rank(orthonormal[:, :4] @ torch.linalg.qr(features(16, 4))[0].T) == pytest.approx(4, rel=1e-2)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_effective_rank_of_features_that_are_all_zero_is_a_number():
    assert math.isfinite(effective_rank(torch.zeros(10, 4)))


def test_feature_std_is_one_for_spread_and_zero_for_collapsed_features():
    spread = features(4000, 32)
    assert feature_std(spread).item() == pytest.approx(1, abs=0.02)
    assert feature_std(spread * torch.logspace(-3, 3, 4000)[:, None]).item() == pytest.approx(1, abs=0.02)
    assert feature_std(features(1, 32).expand(100, -1)).item() == pytest.approx(0, abs=1e-6)
    # Two of 32 directions, with one sign each: the deviation of +-1 in one dimension, none in the others.
    line = torch.zeros(1000, 32)
    line[::2, 0], line[1::2, 0] = 1, -1
    assert feature_std(line).item() == pytest.approx(math.sqrt(32) / 32, rel=1e-3)
    assert feature_std(spread.half()).dtype == torch.float32


def test_a_journal_keeps_the_first_point_of_an_epoch(tmp_path):
    book = Journal(tmp_path / "run")
    book.append(1, {"loss/total": 1.5})
    book.append(2, {"loss/total": 1.25})
    book.append(2, {"loss/total": 9.0})
    again = Journal(tmp_path / "run")
    again.append(1, {"loss/total": 9.0})
    expected = {1: {"loss/total": 1.5}, 2: {"loss/total": 1.25}}
    assert journal.read(tmp_path / "run") == expected
    assert [book.point(epoch) for epoch in (1, 2, 3)] == [again.point(epoch) for epoch in (1, 2, 3)]
    assert [again.point(epoch) for epoch in (1, 2, 3)] == [expected[1], expected[2], None]
    assert len(book.path.read_text().splitlines()) == 2


def test_a_point_does_not_change_with_the_dict_it_came_in(tmp_path):
    book, metrics = Journal(tmp_path), {"loss/total": 1.5}
    book.append(1, metrics)
    metrics["loss/total"] = 9.0
    assert book.point(1) == {"loss/total": 1.5}


@pytest.mark.parametrize("keep", [1, 10, -2, -1], ids=["a byte", "some", "no brace", "no newline"])
def test_a_journal_survives_a_torn_last_line(tmp_path, keep):
    book = Journal(tmp_path)
    for epoch in (1, 2):
        book.append(epoch, {"loss/total": 1.0 / epoch})
    first, second = book.path.read_bytes().splitlines(keepends=True)
    book.path.write_bytes(first + second[:keep])
    survivors = {1, 2} if keep == -1 else {1}  # only the end of the line was lost, not the point
    assert set(journal.read(tmp_path)) == survivors
    again = Journal(tmp_path)
    again.append(2, {"loss/total": 0.5})
    again.append(3, {"loss/total": 0.25})
    assert journal.read(tmp_path) == {epoch: {"loss/total": value} for epoch, value in ((1, 1.0), (2, 0.5), (3, 0.25))}


def test_a_journal_that_is_not_there_is_empty_and_odd_lines_are_passed_over(tmp_path):
    assert journal.read(tmp_path / "none") == {}
    lines = ["", "5", "null", "[1]", '{"loss": 1}', '{"epoch": null}', "\0\0"]
    lines += [json.dumps({"epoch": 3, "loss": loss}) for loss in (2.0, 9.0)]  # the first one counts
    (tmp_path / Journal.NAME).write_text("\n".join(lines))
    assert journal.read(tmp_path) == {3: {"loss": 2.0}}


def save(run_dir, *epochs):
    for epoch in epochs:
        state = {
            "epoch": epoch,
            "model": {},
            "optimizer": {},
            "weights": torch.full((3,), float(epoch)),
            "half": torch.ones(2, dtype=torch.bfloat16),
        }
        checkpoint.save(state, run_dir / checkpoint.name(epoch))


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    save(tmp_path, 3)
    state = checkpoint.load(tmp_path / checkpoint.name(3))
    assert (state["epoch"], state["half"].dtype) == (3, torch.bfloat16)
    assert torch.equal(state["weights"], torch.full((3,), 3.0))
    assert [path.name for path in (tmp_path / "epoch_00003").iterdir()] == [checkpoint.FILE]


def test_checkpoints_are_found_newest_first_and_pruned(tmp_path):
    save(tmp_path, 9, 10, 2)
    (tmp_path / "epoch_00011").write_text("a file")
    (tmp_path / "rotssl-scratch").mkdir()
    assert [path.name for path in checkpoint.found(tmp_path)] == ["epoch_00010", "epoch_00009", "epoch_00002"]
    checkpoint.prune(tmp_path, 2)
    assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [10, 9]
    assert (tmp_path / "rotssl-scratch").is_dir()
    checkpoint.prune(tmp_path, 5)
    assert len(checkpoint.found(tmp_path)) == 2
    assert list(checkpoint.latest(tmp_path / "none")) == []


@pytest.mark.parametrize("damage", ["cut short", "empty", "zeros", "text", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    file = tmp_path / checkpoint.name(2) / checkpoint.FILE
    content = file.read_bytes()
    bad = {
        "cut short": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "text": b"garbage" * 99,
    }
    file.unlink() if damage == "missing" else file.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        assert [state["epoch"] for state in checkpoint.latest(tmp_path)] == [1]
    (record,) = caplog.records
    assert checkpoint.name(2) in record.getMessage()


@pytest.mark.parametrize("room", [0, 200_000], ids=["none", "some"])
def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path, room):
    save(tmp_path, 1)
    with full_disk(room), pytest.raises(OSError, match=r"File too large: .*part"):
        checkpoint.save({"epoch": 2, "weights": torch.ones(1_000_000)}, tmp_path / checkpoint.name(1))
    assert checkpoint.load(tmp_path / checkpoint.name(1))["epoch"] == 1
