import Glibc
import Host
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

/// Whether this process may keep the host's idle processors awake.
public let mayKeepAwake = unsafe access("/dev/cpu_dma_latency", R_OK | W_OK) == 0
public let needsAwake: Comment = "this machine has no /dev/cpu_dma_latency which this user may open"

/// How long an idle processor of this host may take to wake up, in microseconds, by what all who asked asked for.
public func wakeUpLimit() throws -> Int32 {
    let words = try Descriptor.open("/dev/cpu_dma_latency", O_RDONLY).read(upTo: 4) ?? []
    return words.reversed().reduce(0) { $0 << 8 | Int32($1) }
}
