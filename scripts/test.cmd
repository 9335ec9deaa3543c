@echo off
rem Runs the checks and all tests; makes what they need. Arguments go to pytest.
call "%~dp0with-python.cmd" -I "%~dp0test.py" %*
exit /b %ERRORLEVEL%
