"""Small rows and texts for training and evaluation."""

from helpers.models import token_ids

QUICK = {"length": 16, "steps": 4, "batch_size": 2, "log_every": 2, "save_every": 2}


def words(num: int, seed: int = 0) -> str:
    return " ".join(f"w{i}" for i in token_ids(num, seed=seed).tolist())


def rows(kind: str, num: int = 24) -> list[dict]:
    found = [{"text": words(9, seed=i)} for i in range(num)]
    for i, row in enumerate(found):
        if kind == "seq2seq":
            row["target"] = words(5, seed=i)
        elif kind == "classification":
            row["label"] = ("even", "odd")[i % 2]
    return found


def write(path, values: list[dict]) -> str:
    import pandas

    frame = pandas.DataFrame(values)
    if path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)
