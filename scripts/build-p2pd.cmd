@echo off
rem Builds the peer-to-peer daemon, for this system or with --os and --arch for another one.
call "%~dp0with-python.cmd" -I "%~dp0build_p2pd.py" %*
exit /b %ERRORLEVEL%
