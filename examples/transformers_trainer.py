"""`transformers.Trainer` with a `compute_loss` of five lines.

`attach_head` makes the model's head one that computes the loss itself, so that the model is called
as a whole: data parallelism, sharding and checkpointing see an ordinary forward.
"""

from toy import make_model, make_rows, make_tokenizer
from transformers import Trainer, TrainingArguments

from fastrm.data import RaggedCollator, tokenize_rows
from fastrm.model import attach_head

tokenizer, model = make_tokenizer(), make_model()
head = attach_head(model)
ragged = RaggedCollator(tokenizer.pad_token_id, last_token=True)


def collate(examples):
    batch = ragged(examples)
    return {"labels": batch.pop("target"), **batch}  # Trainer counts labels: one a group


class ListwiseTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        groups = {"target": inputs.pop("labels")}
        groups |= {name: inputs.pop(name) for name in ("offsets", "rows")}
        with head.fitting(groups, num_items_in_batch=num_items_in_batch):
            loss = model(**inputs).logits.flatten()[0]
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # devices are averaged
        return (loss, {}) if return_outputs else loss


trainer = ListwiseTrainer(
    model,
    TrainingArguments(
        "runs/transformers", learning_rate=3e-3, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, num_train_epochs=3, logging_steps=6, eval_strategy="epoch",
        remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=tokenize_rows(tokenizer, make_rows(96), max_length=128, pairs=False),
    eval_dataset=tokenize_rows(tokenizer, make_rows(32, seed=1), max_length=128, pairs=False),
    data_collator=collate,
)
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"step {log['step']:3d}  loss {log['loss']:.4f}")
