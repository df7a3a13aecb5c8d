import Glibc
public import Testing

// What this host lets a test do. A test that needs more says so: `.enabled(if: hasKVM, needsKVM)`.

/// Whether virtual machines can run here.
public let hasKVM = unsafe access("/dev/kvm", R_OK | W_OK) == 0
public let needsKVM: Comment = "this machine has no /dev/kvm which this user may open"

/// Whether this process may mount file systems; found out by mounting one.
public let mayMount: Bool = {
    var template = Array("/tmp/godwit-mount-XXXXXX".utf8CString)
    // SAFETY: mkdtemp changes the six X of the terminated text in place; it is read only from there on.
    guard unsafe mkdtemp(&template) != nil else { return false }
    defer { unsafe rmdir(template) }
    guard unsafe mount("none", template, "tmpfs", 0, "size=1m") == 0 else { return false }
    unsafe umount2(template, 0)
    return true
}()
public let needsMount: Comment = "this user may not mount a file system"
