import Glibc

/// The memory of this host.
public enum HostMemory {
    /// Physical memory in bytes.
    public static let byteCount = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE)))

    /// Takes free memory and gives it back, so that who takes it next does not wait for it.
    ///
    /// Where the host is itself a virtual machine, memory that stays free for a while goes back to the outer host, and its first touch
    /// then costs up to fifty times as much: a benchmark would measure that. - Throws: `SystemError` where there is not so much.
    public static func warm(byteCount: Int) throws(SystemError) {
        let mapping = try Mapping(anonymousByteCount: byteCount)
        try? mapping.advise(.hugePages)
        try mapping.advise(.populate)
    }
}
