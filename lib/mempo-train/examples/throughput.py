"""The same training step as throughput.rs with plain PyTorch: OMP_NUM_THREADS=2 python throughput.py [f32|bf16] [steps]

bf16 is autocast over f32 weights, as PyTorch users do it. Prints the best step.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

SEQUENCES, LENGTH, VOCABULARY = 64, 200, 3000
HIDDEN, INNER, LAYERS, HEADS, GROUPS = 192, 512, 4, 6, 2
HEAD = HIDDEN // HEADS


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN, eps=1e-6), nn.RMSNorm(HIDDEN, eps=1e-6)
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, GROUPS * HEAD), nn.Linear(HIDDEN, GROUPS * HEAD)
        self.o = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x, cosines, sines):
        def heads(part):
            return part.unflatten(-1, (-1, HEAD)).transpose(1, 2)

        def rotate(part):
            first, second = part.chunk(2, -1)
            return part * cosines + torch.cat([-second, first], -1) * sines

        h = self.norm1(x)
        q, k, v = rotate(heads(self.q(h))), rotate(heads(self.k(h))), heads(self.v(h))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        angles = torch.outer(torch.arange(LENGTH), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.cosines, self.sines = angles.cos(), angles.sin()
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cosines[: ids.shape[1]], self.sines[: ids.shape[1]])
        return self.norm(x) @ self.embed.weight.T


dtype = sys.argv[1] if len(sys.argv) > 1 else "f32"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 10
torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
best = float("inf")
for step in range(steps):
    start = time.time()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    best = min(best, time.time() - start)
    print(f"step {step}: loss {loss.item():.4f}, {time.time() - start:.3f} s")
count = sum(parameter.numel() for parameter in model.parameters())
print(f"{count} parameters, {dtype}: {SEQUENCES * LENGTH / best:.0f} tokens/s at best")
