"""QLoRA: a frozen backbone in 4 bits, adapters and head in float32, an 8-bit optimiser.

bitsandbytes does both on a CPU too.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from toy import make_model, make_rows, make_tokenizer
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import fastrm

tokenizer = make_tokenizer()
with tempfile.TemporaryDirectory() as folder:
    make_model().save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["score"],  # the head stays a linear layer in full precision
        ),
        device_map="auto" if torch.cuda.is_available() else "cpu",
    )
model = get_peft_model(
    model,
    LoraConfig(
        task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
    ),
)
trainer = fastrm.RewardTrainer(
    model,
    fastrm.RewardConfig(
        "runs/qlora", learning_rate=1e-2, num_train_epochs=3, logging_steps=6, save_strategy="no",
        optim="adamw_bnb_8bit", report_to="none", disable_tqdm=True,
    ),
    train_dataset=make_rows(96),
    processing_class=tokenizer,
)
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"step {log['step']:3d}  loss {log['loss']:.4f}  accuracy {log['accuracy']:.3f}")
