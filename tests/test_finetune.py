"Head only, adapters, a teacher: what moves, what does not, and that what is exported is an ordinary network."
import numpy as np, pytest, timm, torch
from safetensors.torch import load_file, save_file

from cv_lab.backbone import image_network
from cv_lab.core import BadInput
from cv_lab.finetune import add_lora, backbone_of, merge_lora
from cv_lab.tasks import classification
from cv_lab.train import best_network, fit
from tests.test_train import problem

VIT = dict(img_size=16, patch_size=4, embed_dim=96, depth=2, num_heads=3)
RES = dict(channels=[8, 8, 16, 16])
HOW = dict(epochs=2, batch_size=12, lr=5e-3, image=dict(height=16, width=16), patience=50)


@pytest.fixture(autouse=True)
def offline(monkeypatch): monkeypatch.setenv('WANDB_MODE', 'disabled')


@pytest.fixture
def stripes(tmp_path): return classification.example(tmp_path/'stripes')


@pytest.fixture
def weights(tmp_path):
    "Weights of a backbone that has seen something: made here, from a seed."
    def make(name, args):
        torch.manual_seed(7)
        net = timm.create_model(name, num_classes=5, **args)
        path = tmp_path / f'{name}.safetensors'
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 1.5)
        save_file(net.state_dict(), path); return str(path), net.state_dict()
    return make


def test_head_only_leaves_the_backbone_as_it_was_bit_for_bit(stripes, tmp_path, weights):
    path, was = weights('resnet10t', RES)
    run = fit(
        problem(),
        stripes,
        tmp_path / 'r',
        network='resnet10t',
        network_args=RES,
        pretrained=path,
        finetune='head',
        **HOW,
    )
    now = {k.removeprefix('body.'): v for k, v in load_file(run.path/'export/model.safetensors').items()}
    body = [k for k in was if not k.startswith('fc.')]
    assert len(body) > 20 and all(torch.equal(now[k], was[k]) for k in body)  # batch norm's statistics too
    torch.manual_seed(0)
    other = fit(
        problem(),
        stripes,
        tmp_path / 'r',
        network='resnet10t',
        network_args=RES,
        pretrained=path,
        finetune='head',
        **HOW | dict(epochs=1),
    )
    assert not torch.equal(
        load_file(other.path / 'export/model.safetensors')['body.fc.weight'], now['fc.weight']
    )  # the head moved


def test_adapters_train_a_few_per_cent_and_what_is_kept_is_the_plain_network(stripes, tmp_path, weights, capsys):
    path, was = weights('vit_tiny_patch16_224', VIT)
    args = dict(network='vit_tiny_patch16_224', network_args=VIT, pretrained=path)
    run = fit(problem(), stripes, tmp_path / 'r', finetune='lora', lora_rank=2, **args, **HOW)
    assert 'of them trained' in capsys.readouterr().out
    net, cfg = best_network(run)
    kept = load_file(run.path / 'export/model.safetensors')
    assert set(kept) == set(net.state_dict()) and not any('lora' in k for k in kept)
    # the same from the checkpoint, with the adapters in their places
    state = torch.load(run.path / 'checkpoints/best.ckpt', weights_only=True)['state_dict']
    tuned = image_network('vit_tiny_patch16_224', 3, **VIT)
    add_lora(tuned, 2)
    share = sum(p.numel() for p in tuned.parameters() if p.requires_grad) / sum(p.numel() for p in tuned.parameters())
    assert 0.005 < share < 0.05
    tuned.load_state_dict({k.removeprefix('net.'): v for k, v in state.items()})
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad(): a, b = net(images)['logits'], tuned.eval()(images)['logits']
    assert (a - b).abs().max() < 1e-5
    block = 'blocks.0.attn.qkv.weight'; moved = (kept[f'body.{block}'] - was[block]).abs().max(); assert moved > 1e-6
    assert torch.linalg.matrix_rank(kept[f'body.{block}'] - was[block], rtol=1e-3) <= 2  # by a low-rank correction
    assert torch.equal(kept['body.pos_embed'], was['pos_embed'])


def test_the_exported_graph_of_a_tuned_network_answers_as_the_checkpoint(stripes, tmp_path, weights):
    from cv_lab.optimize import export_run, parity
    from cv_lab.predict import Predictor

    path, _ = weights('resnet10t', RES)
    run = fit(
        problem(), stripes, tmp_path / 'r', network_args=RES, pretrained=path, finetune='lora', lora_rank=2, **HOW
    )
    found = parity(run, Predictor(export_run(run, problem()), 'cpu'), stripes.split('test'), stripes.read)
    assert found['ok'], found


def test_convolutions_are_merged_too_and_features_are_all_backbone():
    from cv_lab.pyramid import pyramid

    p = pyramid('resnet10t', width=16, channels=(8, 8, 16, 16)).eval()
    body, heads = backbone_of(p)
    assert not heads and body is p.features.body
    names = set(p.state_dict()); add_lora(p, 2); images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for n, w in p.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(w, std=.02)
    with torch.no_grad(): a = p(images); b = merge_lora(p)(images)
    assert set(p.state_dict()) == names and all(
        (x - y).abs().max() < 1e-5 * max(1, float(x.abs().max())) for x, y in zip(a, b)
    )
    with pytest.raises(BadInput, match='no network of timm'): backbone_of(torch.nn.Linear(2, 2))


def test_a_student_learns_the_teachers_answers(stripes, tmp_path):
    teacher = fit(
        problem(), stripes, tmp_path / 'r', **HOW | dict(epochs=12), network_args=dict(channels=[16, 16, 32, 32])
    )
    net, _ = best_network(teacher)
    small = HOW | dict(epochs=6, network_args=RES)
    alone = fit(problem(), stripes, tmp_path / 'r', **small)
    taught = fit(problem(), stripes, tmp_path / 'r', teacher=teacher.name, distill=1.0, **small)
    assert alone.name != taught.name and taught.config['teacher'] == teacher.done['weights']
    x = torch.stack([torch.from_numpy(i) for i in _pixels(stripes)])
    far = lambda run: float(
        torch.nn.functional.kl_div(
            best_network(run)[0](x)['logits'].log_softmax(1), net(x)['logits'].softmax(1), reduction='batchmean'
        )
    )
    with torch.no_grad(): assert far(taught) < far(alone)
    with pytest.raises(BadInput, match='another question'):
        fit(problem(), stripes, tmp_path / 'r', teacher=teacher.name, **HOW | dict(image=dict(height=32, width=32)))


def _pixels(data):
    from cv_lab.image import Preprocess, decode, preprocess
    return [preprocess(decode(data.read(u)), Preprocess(16, 16)) for u in data.split('val')['uri'].to_pylist()]


def test_the_distance_is_hintons():
    from cv_lab.tasks.classification import Config, distill

    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(2, 5, 4)) * 3
    soft = lambda v: np.exp(v / 2) / np.exp(v / 2).sum(1, keepdims=True)
    want = 4 * np.mean((soft(t) * np.log(soft(t) / soft(z))).sum(1))
    got = distill(dict(logits=torch.tensor(z)), dict(logits=torch.tensor(t)), Config(), 2.0)
    assert abs(float(got) - want) < 1e-5
