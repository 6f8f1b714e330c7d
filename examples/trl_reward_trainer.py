"""TRL's `RewardTrainer` where a chosen answer has any number of rejected ones."""

from datasets import Dataset
from toy import make_model, make_rows, make_tokenizer
from trl import RewardConfig

from fastrm.integrations.trl import ListwiseRewardTrainer


def preference(row):
    """TRL's columns; `rejected` may be one answer, or a list of them."""
    rejected = list(row["candidates"])
    chosen = rejected.pop(row["best"])
    return {"prompt": row["prompt"] + " ", "chosen": chosen, "rejected": rejected}


trainer = ListwiseRewardTrainer(
    make_model(),
    RewardConfig(
        "runs/trl", learning_rate=3e-3, per_device_train_batch_size=8, num_train_epochs=3,
        logging_steps=6, eval_strategy="epoch", save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, bf16=False,
    ),
    train_dataset=Dataset.from_list([preference(row) for row in make_rows(96)]),
    eval_dataset=Dataset.from_list([preference(row) for row in make_rows(32, seed=1)]),
    processing_class=make_tokenizer(),
)
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"step {log['step']:3d}  loss {log['loss']:.4f}  accuracy {log['accuracy']:.3f}")
