"""`make check`: the package is what the notebooks export, the notebooks are clean, the lint passes. Changes no file.

With `--pages` (`make pages`): every page is run, each in a process of its own, and one that fails is named.
With `--refresh` (`make notebooks`): every page is run again in place, so that its shown output is fresh.
"""
import difflib, filecmp, json, os, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def tool(name:str, *args:str, cwd:Path=ROOT) -> None:
    done = subprocess.run(
        [str(BIN / name), *args], cwd=cwd, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(cwd)}
    )
    if done.returncode: print(done.stdout + done.stderr, file=sys.stderr); sys.exit(f'{name} failed')


def copy(to:Path) -> None:
    for name in ('nbs', 'cv_lab'):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, to/name)


def differences(a:Path, b:Path) -> list[Path]:
    files = {
        p.relative_to(top)
        for top in (a, b)
        for p in [*top.glob('nbs/**/*.ipynb'), *top.glob('cv_lab/**/*.py')]
        if '.ipynb_checkpoints' not in p.parts
    }
    return sorted(f for f in files if not ((a/f).exists() and (b/f).exists() and filecmp.cmp(a/f, b/f, shallow=False)))


def check() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); copy(tmp)
        shutil.rmtree(tmp / 'cv_lab')
        (tmp / 'cv_lab').mkdir()
        shutil.copy(ROOT / 'cv_lab/__init__.py', tmp / 'cv_lab')  # a module without a page does not come back
        tool('nbdev_export', cwd=tmp); tool('nbdev_clean', cwd=tmp)
        for package in (ROOT/'cv_lab').glob('*/__init__.py'): (tmp/package.relative_to(ROOT)).touch()
        if bad := differences(ROOT, tmp):
            for f in bad[:5]:
                old, new = ((top/f).read_text().splitlines() if (top/f).exists() else [] for top in (ROOT, tmp))
                print(
                    *list(
                        difflib.unified_diff(old, new, f'{f} (yours)', f'{f} (exported and cleaned)', lineterm='', n=1)
                    )[:30],
                    sep='\n',
                )
            sys.exit(
                f'{len(bad)} files differ: {", ".join(map(str, bad))}\nMend it: edit the notebook, then nbdev_export && nbdev_clean'
            )
    tool('ruff', 'check', 'cv_lab', 'tests')
    print(f'check: {len(list(ROOT.glob("nbs/**/*.ipynb")))} notebooks, no drift, clean, lint passes')


def refresh() -> None:
    pages = sorted(p for p in (ROOT/'nbs').glob('*.ipynb'))

    def one(page):
        nb = json.loads(page.read_text(encoding='utf8'))  # exec_nb leaves what a cell showed before where it shows nothing now
        for c in nb['cells']:
            if c['cell_type'] == 'code': c['outputs'] = []
        page.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf8')
        tool('exec_nb', page.name, '--dest', page.name, '--exc_stop', cwd=page.parent)
        print(f'  {page.name}', flush=True)

    os.environ['PYTHONPATH'] = str(ROOT)
    with ThreadPoolExecutor(2) as pool: list(pool.map(one, pages))
    tool('nbdev_clean'); print(f'{len(pages)} pages are fresh')


def pages() -> None:
    names = sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb'))
    def one(name):
        done = subprocess.run(
            [str(BIN / 'nbdev_test'), '--path', f'nbs/{name}', '--n_workers', '0'],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        print(f'  {name}' + ('' if done.returncode == 0 else ' FAILED'), flush=True)
        return None if done.returncode == 0 and 'Success' in done.stdout else f'{name}:\n{done.stderr[-3000:]}'
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool: failed = [f for f in pool.map(one, names) if f]
    if failed: sys.exit('\n'.join(failed) + f'\n{len(failed)} of {len(names)} pages fail')
    print(f'pages: {len(names)} run')


if __name__ == '__main__': refresh() if '--refresh' in sys.argv else pages() if '--pages' in sys.argv else check()
