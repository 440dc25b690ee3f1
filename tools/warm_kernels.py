"""Kernels that need not import torch and the like: each is forked from one process that has done so.

A kernel's first cell takes five seconds of imports, and most of our notebooks do little more. Here a server
process (the forkserver of Python's `multiprocessing`) imports the libraries once, and runs nothing else.
Every kernel begins as a copy of it, and so none sees what another did.
"""
import atexit
import multiprocessing
import os
import sys

from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

IMPORTED = ['ipykernel.kernelapp', 'lad_nb.cli', 'lad_nb.study', 'lad_nb.panel',  # and all that these import;
            'ipykernel.ipkernel',  # what a kernel imports when it begins;
            'nbclient', 'PIL.Image',  # what the program that asks imports: each forked process does so, too;
            'frozen']  # the last: so that no collection looks at them again
INLINE = 'module://matplotlib_inline.backend_inline'  # where a kernel has pictures drawn

server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(IMPORTED)


def be_a_kernel(argv, env, folder):
    "What a forked process does: as `python -m ipykernel_launcher` there."
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    argv = [*argv, f'--IPKernelApp.parent_handle={os.getppid()}']  # it ends with the server
    sys.argv = ['ipykernel_launcher.py', *argv]
    from ipykernel.kernelapp import IPKernelApp
    try:
        IPKernelApp.launch_instance(argv)
    finally:
        atexit._run_exitfuncs()  # which a forked process skips: temporary folders would stay


class Forked:
    "A forked process, with the names that subprocess.Popen has for things."
    stdin = stdout = stderr = None

    def __init__(self, process):
        process.start()
        self.process, self.pid = process, process.pid
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self): return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)


class ForkingProvisioner(LocalProvisioner):
    "Forks a kernel where others start a program."
    async def launch_kernel(self, cmd, **how):
        os.environ.setdefault('MPLBACKEND', INLINE)  # read by matplotlib when it is imported: by the server
        argv = cmd[cmd.index('-f'):]
        kernel = (argv, dict(how['env']), str(how['cwd']))
        self.process = Forked(server.Process(target=be_a_kernel, args=kernel))
        self.pid = self.process.pid
        return self.connection_info


class WarmKernel(AsyncKernelManager):
    "Manages a kernel that is forked."
    def __init__(self, **how):
        super().__init__(**how)
        self.provisioner = ForkingProvisioner(
            parent=self, kernel_id=self.kernel_id, kernel_spec=self.kernel_spec)
