import Glibc

/// A shared library opened at run time (dlopen), for features that a machine may lack: the build needs none of them.
///
/// It stays loaded for the life of the process: function pointers taken from it never dangle.
@safe public final class DynamicLibrary: Sendable {
    /// The name under which it was found: `libzstd.so.1`.
    public let name: String
    /// SAFETY: dlsym may be called from any thread; the handle is never closed.
    private nonisolated(unsafe) let handle: UnsafeMutableRawPointer

    /// Opens the first of `names` that is there. - Throws: `DynamicLibraryError` naming what was looked for and `remedy`.
    public init(_ names: [String], remedy: String) throws(DynamicLibraryError) {
        var reason = "no name was given"
        for name in names {
            if let found = unsafe dlopen(name, RTLD_NOW | RTLD_LOCAL) {
                self.name = name
                unsafe handle = found
                return
            }
            reason = unsafe dlerror().map { unsafe String(cString: $0) } ?? "dlopen failed"
        }
        throw DynamicLibraryError("open \(names.joined(separator: " or ")): \(reason); \(remedy)")
    }

    /// The function of that name, as `type`, which is a `@convention(c)` function type.
    ///
    /// - Throws: `DynamicLibraryError` if the library has none.
    ///
    /// Unsafe: nothing checks that the function has that type; it is to be the one of the library's header.
    @unsafe public func function<F>(_ name: String, as type: F.Type) throws(DynamicLibraryError) -> F {
        precondition(MemoryLayout<F>.size == MemoryLayout<Int>.size, "a C function pointer")
        guard let symbol = unsafe dlsym(handle, name) else {
            throw DynamicLibraryError("\(self.name) has no function \(name); install a newer version of it")
        }
        return unsafe unsafeBitCast(symbol, to: type)
    }
}

/// A library or a function of it that is not there: one sentence with the remedy.
public struct DynamicLibraryError: Error, Sendable, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}
