"A model folder for every task, answering by brightness: graphs of a few nodes, made without torch in a moment."
import io
from pathlib import Path

import numpy as np, onnx
from onnx import TensorProto as T, helper as h, numpy_helper as nh
from PIL import Image, ImageDraw

from cv_lab.image import Preprocess
from cv_lab.predict import describe_model
from cv_lab.service.models import toy_model
from cv_lab.task import get_task

HEIGHT, WIDTH, STRIDE = 64, 96, 8
CLASSES = dict(detection=['dark', 'bright'], segmentation=['bright'], reading=['a', 'b'])


def scene(format='PNG'):
    "Two bright things on a dark ground, at known places: (16, 16, 40, 32) and (56, 24, 88, 48)."
    im = Image.new('RGB', (WIDTH, HEIGHT), (20, 30, 40)); d = ImageDraw.Draw(im); b = io.BytesIO()
    d.rectangle((16, 16, 39, 31), fill=(250, 240, 200))
    d.rectangle((56, 24, 87, 47), fill=(200, 250, 240))
    im.save(b, format)
    return b.getvalue()


def _grey(pool):  # nodes that give `s` (n, 1, h, w): positive where it is bright
    nodes = [
        h.make_node('Cast', ['images'], ['x'], to=T.FLOAT),
        h.make_node('ReduceMean', ['x', 'channel'], ['m'], keepdims=1),
    ]
    nodes += (
        [h.make_node('AveragePool', ['m'], ['p'], kernel_shape=[pool, pool], strides=[pool, pool])]
        if pool > 1
        else [h.make_node('Identity', ['m'], ['p'])]
    )
    return [
        *nodes,
        h.make_node('Sub', ['p', 'middle'], ['c']),
        h.make_node('Mul', ['c', 'gain'], ['s']),
        h.make_node('Neg', ['s'], ['n']),
    ]


def _segmentation():
    return _grey(1) + [h.make_node('Concat', ['n', 's'], ['logits'], axis=1)], {}, dict(logits=['n', 2, HEIGHT, WIDTH])


def _detection():
    "A box at every bright cell: the thing that the cell lies in, else the cell."
    y, x = (a.ravel() * STRIDE for a in np.mgrid[: HEIGHT // STRIDE, : WIDTH // STRIDE])
    cell = np.stack([x, y, x + STRIDE, y + STRIDE], 1).astype(np.float32)
    for box in ((16, 16, 40, 32), (56, 24, 88, 48)):
        cell[(x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])] = box
    A = len(cell);    nodes = [
        *_grey(STRIDE),
        h.make_node('Reshape', ['s', 'flat'], ['f']),
        h.make_node('Mul', ['f', 'zero'], ['z']),
        h.make_node('Add', ['z', 'far'], ['never']),
        h.make_node('Concat', ['never', 'f'], ['logits'], axis=2),
        h.make_node('Add', ['z', 'cells'], ['boxes']),
    ]
    return (
        nodes,
        dict(flat=[-1, A, 1], far=np.float32(-20), zero=np.float32(0), cells=cell[None]),
        dict(logits=['n', A, 2], boxes=['n', A, 4]),
    )


def _reading():
    "Bright cells are lines, and every bright column a `b`."
    nodes = [
        *_grey(8),
        h.make_node('Mul', ['s', 'zero'], ['z']),
        h.make_node('Add', ['z', 'edge'], ['e']),
        h.make_node('Concat', ['s', 'e', 'e', 'e', 'e'], ['lines'], axis=1),
        h.make_node('AveragePool', ['m'], ['p4'], kernel_shape=[4, 4], strides=[4, 4]),
        h.make_node('Sub', ['p4', 'middle'], ['c4']),
        h.make_node('Mul', ['c4', 'gain'], ['s4']),
        h.make_node('Neg', ['s4'], ['n4']),
        h.make_node('Mul', ['s4', 'zero'], ['z4']),
        h.make_node('Concat', ['z4', 'n4', 's4', 'z4'], ['chars'], axis=1),
    ]
    return (
        nodes,
        dict(zero=np.float32(0), edge=np.float32(8)),
        dict(chars=['n', 4, HEIGHT // 4, WIDTH // 4], lines=['n', 5, HEIGHT // 8, WIDTH // 8]),
    )


GRAPHS = dict(detection=_detection, segmentation=_segmentation, reading=_reading)


def toy(folder, task:str): # the folder
    "A model of a task."
    folder = Path(folder)
    if task == 'classification': return toy_model(folder, problem='classification', size=32)
    nodes, more, outputs = GRAPHS[task]()
    const = dict(channel=[1], middle=np.float32(110), gain=np.float32(0.06)) | more
    graph = h.make_graph(
        nodes,
        task,
        [h.make_tensor_value_info('images', T.UINT8, ['n', 3, HEIGHT, WIDTH])],
        [h.make_tensor_value_info(n, T.FLOAT, s) for n, s in outputs.items()],
        [nh.from_array(np.asarray(v), n) for n, v in const.items()],
    )
    folder.mkdir(parents=True)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid('', 18)], ir_version=10), folder / 'model.onnx')
    describe_model(folder, task, task, CLASSES[task], get_task(task).Config(image=Preprocess(HEIGHT, WIDTH)))
    return folder


TASKS = ('classification', *GRAPHS)
