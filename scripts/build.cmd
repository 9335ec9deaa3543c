@echo off
rem Builds the sdist and the wheels of a release into dist. Names of targets, such as windows/amd64, build only those.
call "%~dp0with-python.cmd" -I -S "%~dp0bootstrap.py" build %*
exit /b %ERRORLEVEL%
