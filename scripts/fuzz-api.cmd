@echo off
rem Asks the API 500 times at each of its operations, by chance, whether what comes back is documented; PETALS_WIN_FUZZ_EXAMPLES says another number.
if not defined PETALS_WIN_FUZZ_EXAMPLES set PETALS_WIN_FUZZ_EXAMPLES=500
call "%~dp0test.cmd" "%~dp0..\tests\api\fuzz_api.py" --timeout 1800 %*
exit /b %ERRORLEVEL%
