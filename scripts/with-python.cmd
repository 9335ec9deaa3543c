@echo off
rem Runs a Python 3.11 to 3.13 with the given arguments: that of .venv, if it is there, or else the newest of this PC.
setlocal
set "RIGHT=import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
set FOUND="%~dp0..\.venv\Scripts\python.exe"
if exist %FOUND% %FOUND% -I -S -c "%RIGHT%" >nul 2>nul && goto found
for %%V in (3.13 3.12 3.11) do (
    py -%%V -I -S -c "%RIGHT%" >nul 2>nul && set "FOUND=py -%%V" && goto found
)
for %%P in (python3.exe python.exe) do (
    %%P -I -S -c "%RIGHT%" >nul 2>nul && set "FOUND=%%P" && goto found
)
echo petals-win needs Python 3.11 to 3.13, and none is installed. Get it from https://www.python.org/downloads/ 1>&2
echo or type: winget install Python.Python.3.13 1>&2
exit /b 1
:found
%FOUND% %*
exit /b %ERRORLEVEL%
