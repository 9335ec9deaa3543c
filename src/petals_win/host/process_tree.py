"""A process and whatever it starts, to be ended together.

Knows Windows job objects, which the system itself ends with their last handle, and POSIX process groups, which it does
not. Does not know what the processes are.
"""

import os
import signal
import sys

if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    _EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
    _KILL_ON_JOB_CLOSE = 0x2000
    _QUERY, _SET_QUOTA_AND_TERMINATE = 0x0400, 0x0100 | 0x0001

    class _BasicLimits(ctypes.Structure):
        _fields_ = [
            ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
            ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
            ("LimitFlags", wintypes.DWORD),
            ("MinimumWorkingSetSize", ctypes.c_size_t),
            ("MaximumWorkingSetSize", ctypes.c_size_t),
            ("ActiveProcessLimit", wintypes.DWORD),
            ("Affinity", ctypes.c_size_t),
            ("PriorityClass", wintypes.DWORD),
            ("SchedulingClass", wintypes.DWORD),
        ]

    class _ExtendedLimits(ctypes.Structure):
        _fields_ = [
            ("BasicLimitInformation", _BasicLimits),
            ("IoInfo", ctypes.c_ulonglong * 6),
            ("ProcessMemoryLimit", ctypes.c_size_t),
            ("JobMemoryLimit", ctypes.c_size_t),
            ("PeakProcessMemoryUsed", ctypes.c_size_t),
            ("PeakJobMemoryUsed", ctypes.c_size_t),
        ]

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel32.CreateJobObjectW.restype = wintypes.HANDLE
    _kernel32.CreateJobObjectW.argtypes = [wintypes.LPVOID, wintypes.LPCWSTR]
    _kernel32.SetInformationJobObject.argtypes = [wintypes.HANDLE, ctypes.c_int, wintypes.LPVOID, wintypes.DWORD]
    _kernel32.OpenProcess.restype = wintypes.HANDLE
    _kernel32.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
    _kernel32.IsProcessInJob.argtypes = [wintypes.HANDLE, wintypes.HANDLE, ctypes.POINTER(wintypes.BOOL)]
    _kernel32.AssignProcessToJobObject.argtypes = [wintypes.HANDLE, wintypes.HANDLE]
    _kernel32.TerminateJobObject.argtypes = [wintypes.HANDLE, wintypes.UINT]
    _kernel32.CloseHandle.argtypes = [wintypes.HANDLE]

    class ProcessTree:
        """A job object: its processes, and what they start, end with this process however it ends."""

        def __init__(self) -> None:
            self._handle = _checked(_kernel32.CreateJobObjectW(None, None))
            limits = _ExtendedLimits()
            limits.BasicLimitInformation.LimitFlags = _KILL_ON_JOB_CLOSE
            _checked(
                _kernel32.SetInformationJobObject(
                    self._handle, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
                )
            )

        def add(self, pid: int) -> None:
            """Take a running process in, unless it is; raises OSError when it has ended already or the system forbids it."""
            process = _checked(_kernel32.OpenProcess(_QUERY | _SET_QUOTA_AND_TERMINATE, False, pid))
            try:
                inside = wintypes.BOOL()
                _checked(_kernel32.IsProcessInJob(process, self._handle, ctypes.byref(inside)))
                if not inside:
                    _checked(_kernel32.AssignProcessToJobObject(self._handle, process))
            finally:
                _kernel32.CloseHandle(process)

        def kill(self) -> None:
            """End all of them at once."""
            _checked(_kernel32.TerminateJobObject(self._handle, 1))

        def close(self) -> None:
            """Give the handle back, which ends what still runs in the job. Safe to call twice."""
            handle, self._handle = self._handle, None
            if handle is not None:
                _kernel32.CloseHandle(handle)

    def _checked(result: int | None) -> int:
        if not result:
            raise ctypes.WinError(ctypes.get_last_error())
        return result

else:

    class ProcessTree:
        """A process group: what is in it ends with `kill`, not by itself."""

        def __init__(self) -> None:
            self._leader: int | None = None

        def add(self, pid: int) -> None:
            """Take in a running process that leads a group of its own and that has not been waited for."""
            self._leader = pid

        def kill(self) -> None:
            """End all of them at once."""
            if self._leader is not None:
                os.killpg(self._leader, signal.SIGKILL)

        def close(self) -> None:
            """Forget the group. Safe to call twice."""
            self._leader = None
