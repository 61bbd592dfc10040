from test_traced import compare, images
import torch, pytest
from fastlayers import nn
def test_c(device):
    for name, mk, sh in [("pad",lambda s:s.Conv2d(2,4,3,padding=1),(2,2,6,6)),("stride",lambda s:s.Conv2d(4,4,3,stride=2,bias=False),(2,4,6,6)),("g",lambda s:s.Conv2d(4,2,1,groups=2),(2,4,2,2)),
      ("seq",lambda s:s.Sequential(s.Conv2d(2,4,3,padding=1), s.ReLU(), s.Conv2d(4,4,3,stride=2,bias=False)),(2,2,6,6)),
      ("seq2",lambda s:s.Sequential(s.Conv2d(2,4,3,padding=1), s.Conv2d(4,4,3,bias=False)),(2,2,6,6))]:
        ours, theirs = mk(nn).to(device), mk(torch.nn).to(device)
        theirs.load_state_dict(ours.state_dict())
        try: compare(ours, ours, theirs, torch.randn(*sh, device=device)); print(name,"ok")
        except AssertionError as e: print(name,"bad", str(e)[-100:])
