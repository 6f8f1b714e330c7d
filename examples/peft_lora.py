"""LoRA with PEFT: adapters and head train, are saved together, loaded and merged.

`modules_to_save` names the head: it is trained whole, not through an adapter, and saved with them.
"""

import tempfile

from peft import LoraConfig, PeftModel, get_peft_model
from toy import make_model, make_rows, make_tokenizer

import fastrm
from fastrm.evaluate import score_rows

tokenizer = make_tokenizer()
model = get_peft_model(
    make_model(),
    LoraConfig(
        task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
    ),
)
model.print_trainable_parameters()
trainer = fastrm.RewardTrainer(
    model,
    fastrm.RewardConfig(
        "runs/lora", learning_rate=1e-2, num_train_epochs=3, logging_steps=6, save_strategy="no",
        report_to="none", disable_tqdm=True,
    ),
    train_dataset=make_rows(96),
    processing_class=tokenizer,
)
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"step {log['step']:3d}  loss {log['loss']:.4f}  accuracy {log['accuracy']:.3f}")

rows = make_rows(3, seed=1)
with tempfile.TemporaryDirectory() as folder:
    trainer.save_model(folder)  # adapter_model.safetensors: the adapters and the head
    loaded = PeftModel.from_pretrained(make_model(), folder)
    merged = PeftModel.from_pretrained(make_model(), folder).merge_and_unload()  # no PEFT in it
for name, m in {"trained": model, "loaded": loaded, "merged": merged}.items():
    rewards = score_rows(m, tokenizer, rows)
    print(f"{name:8s}", *([f"{r:.4f}" for r in group] for group in rewards))
