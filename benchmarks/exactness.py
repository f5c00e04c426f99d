"""How exact the token tree is: loss and every adapter gradient against the padded computation.

Tiny random models in float64 of several architectures, with every kind of batch of
`tests/test_tree.py`; the variant with a detached prefix shows that the comparison can fail.

    python benchmarks/exactness.py
"""

from __future__ import annotations

import sys

import workload

sys.path.insert(0, str(workload.ROOT / "tests"))

from test_tree import BATCHES, adapted, gradients, padded_loss, relative_error, tree_loss

from conftest import ARCHITECTURES


def main() -> None:
    rows, results = [], {}
    for architecture in ARCHITECTURES:
        model = adapted(architecture)
        num_gradients = sum(p.requires_grad for p in model.parameters())
        worst_loss = worst_gradient = 0.0
        for batch in BATCHES.values():
            expected_loss = padded_loss(model, batch)
            expected = gradients(model, expected_loss)
            for max_tokens in (10_000, 25):
                loss = tree_loss(model, batch, max_tokens)
                found = gradients(model, loss)
                error = abs(float((loss - expected_loss) / expected_loss))
                worst_loss = max(worst_loss, error)
                worst_gradient = max(worst_gradient, relative_error(found, expected))
        results[architecture] = {"loss": worst_loss, "gradient": worst_gradient}
        rows.append(
            [architecture, str(num_gradients), f"{worst_loss:.1e}", f"{worst_gradient:.1e}"]
        )
    header = ["architecture", "adapter matrices", "worst loss error", "worst gradient error"]
    workload.print_table(header, rows)
    print(f"\nrelative errors over {2 * len(BATCHES)} batches each")
    workload.write("exactness", results)
    if max(max(errors.values()) for errors in results.values()) > 1e-6:
        raise SystemExit("error: the tree is not exact")


if __name__ == "__main__":
    main()
