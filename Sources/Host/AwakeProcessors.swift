import Glibc

/// As long as one lives, the host's processors do not sleep so deeply, when they have nothing to do, that it takes time to wake them.
///
/// Where a page that somebody waits for goes through four threads, waking up the processors for them can take longer than all the
/// rest. This costs power, and no work of anybody's: threads that want a processor get it as before. The kernel forgets it with the
/// process, however that ends. Source: Linux, Documentation/power/pm_qos_interface.rst, `/dev/cpu_dma_latency`.
public final class AwakeProcessors: Sendable {
    private let request: Descriptor

    private static let path = "/dev/cpu_dma_latency"

    /// - Throws: `SystemError` where the host has no such file, or does not let this process have a say.
    public init() throws(SystemError) {
        request = try Descriptor.open(Self.path, O_WRONLY)
        // Microseconds, as a native 32-bit number.
        try request.writeAll([0, 0, 0, 0])
    }
}
