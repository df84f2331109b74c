"""threadpoolctl, where it is installed, sees and limits the threads of fastblock.

threadpoolctl finds a library by the name of its file and talks to it through C symbols, so `threadpool_limits` and
`threadpool_info` work here as they do for a BLAS.
"""

try:
    from threadpoolctl import LibController, register
except ImportError:  # not installed, or older than 3.2: then there is nobody to tell
    pass
else:

    class FastblockController(LibController):
        user_api = "fastblock"
        internal_api = "fastblock"
        filename_prefixes = ("_core.",)
        check_symbols = ("fb_get_process_threads", "fb_set_num_threads")

        def get_num_threads(self):
            return self.dynlib.fb_get_process_threads()  # what it restores is the number of the process

        def set_num_threads(self, num_threads):
            self.dynlib.fb_set_num_threads(num_threads)

        def get_version(self):
            from . import __version__

            return __version__

    register(FastblockController)
