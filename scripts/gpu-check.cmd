@echo off
rem Checks and measures petals-win on this PC's GPU, with the torch that is installed: see gpu_check.py.
setlocal
set PYTHON="%~dp0..\.venv\Scripts\python.exe"
if not exist %PYTHON% set PYTHON=python.exe
%PYTHON% "%~dp0gpu_check.py" %*
exit /b %ERRORLEVEL%
