"""In the manner of a tutorial on sequences: words, an LSTM, tags."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(1)
SENTENCES = [("the dog ate the apple", "D N V D N"), ("everybody read that book", "N V D N")]
words = {w: i for i, w in enumerate(sorted({w for s, _ in SENTENCES for w in s.split()}))}
tags = {"D": 0, "N": 1, "V": 2}


class LSTMTagger(nn.Module):
    def __init__(self, embedding, hidden):
        super().__init__()
        self.word_embeddings = nn.Embedding(len(words), embedding)
        self.lstm = nn.LSTM(embedding, hidden)
        self.hidden2tag = nn.Linear(hidden, len(tags))

    def forward(self, sentence):
        embeds = self.word_embeddings(sentence)
        out, _ = self.lstm(embeds.view(len(sentence), 1, -1))
        return F.log_softmax(self.hidden2tag(out.view(len(sentence), -1)), dim=1)


model = LSTMTagger(6, 6)
loss_function = nn.NLLLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for epoch in range(3):
    for sentence, gold in SENTENCES:
        model.zero_grad()
        scores = model(torch.tensor([words[w] for w in sentence.split()]))
        loss = loss_function(scores, torch.tensor([tags[t] for t in gold.split()]))
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch} loss {loss.item():.3f}")
