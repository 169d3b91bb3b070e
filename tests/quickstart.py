"""PEFT's quickstart, word for word but for the model, which is a folder on this machine."""

import json
import sys

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

model_id, output = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(model_id)

peft_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, bias="none"
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))

model.save_pretrained(output)
base_model = AutoModelForCausalLM.from_pretrained(model_id)
lora_model = PeftModel.from_pretrained(base_model, output)
same = torch.equal(lora_model(ids).logits, model.eval()(ids).logits)
library = type(lora_model).__module__.partition(".")[0]
print(json.dumps({"losses": losses, "same": same, "library": library}))
