"""Reads everything from settings.ini, so that a version or a requirement is written once."""
from configparser import ConfigParser
from pathlib import Path

import setuptools

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    keywords=cfg['keywords'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=setuptools.find_packages(include=['lad_nb', 'lad_nb.*']),
    package_data={'lad_nb': ['py.typed']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split()
                    for extra in ('dev', 'offline', 'onnx', 'trackers', 'cluster', 'completion', 'docs')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['lad_nb=lad_nb._modidx:d']},
    zip_safe=False,
)
