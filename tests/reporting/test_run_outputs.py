"""The data card describes the data of a run."""

from covid_cls.reporting.run_outputs import data_card
from tests.reporting.test_tensorboard import RECORD, with_data


def test_the_data_card_has_the_counts_of_the_record() -> None:
    card = data_card(RECORD)
    assert card.startswith("# chests\n\n**Research use, not for diagnosis.** Splits by patient, seed 5.")
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert rows == [
        "| split | covid | normal | pneumonia | images | patients |",
        "| --- | --- | --- | --- | --- | --- |",
        "| train | 100 | 500 | 400 | 1,000 | 700 |",
        "| val | 20 | 60 | 50 | 130 | 100 |",
        "| test | 14 | 50 | 40 | 104 | 100 |",
        "| all | 134 | 610 | 490 | 1,234 | 900 |",
        "| source | images |",
        "| --- | --- |",
        "| nih | 1,100 |",
        r"| a\|b | 134 |",
    ]
    assert "Quarantined" not in card
    assert card.endswith(f"## Notes\n\n- {RECORD['notes'][0]}\n")


def test_the_data_card_describes_folds_leaky_splits_and_quarantine() -> None:
    record = with_data(group="image", folds=5, fold=2)
    lost = [{"path": f"images/{k}.png", "line": k + 2, "reason": "truncated"} for k in range(25)]
    record = {**record, "data": {**RECORD["data"], "quarantined": lost}, "notes": []}
    card = data_card(record)
    assert "Splits by image, so that a patient can be in two of them, seed 5; fold 2 of 5 is the test part." in card
    assert "25 images could not be decoded and were left out. These are the first 20; run.json lists all." in card
    assert card.count("truncated") == 20
    assert "| images/0.png | 2 | truncated |" in card
    assert card.endswith("## Notes\n\nThere are no notes.\n")
